"""From a trained adapter to files that need no smidgen."""
