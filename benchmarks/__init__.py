"""What a request costs beside the original, and whether cleanup makes anyone wait. See README.md."""
