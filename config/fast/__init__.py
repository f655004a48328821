"""What makes the networks fast, and lets images of any size through them."""
