"""From disk or network to one verified array of pictures."""
