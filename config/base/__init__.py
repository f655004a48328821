"""What everything else uses: errors, console, files, images, options, devices, ranks."""
