"""What happens beside training: each callback is one file, and none of them changes a weight."""
