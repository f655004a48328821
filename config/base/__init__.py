"""The ground floor: errors, console, files, images, options, devices, ranks. It imports nothing else of the project."""
