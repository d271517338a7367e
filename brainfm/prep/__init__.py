"""From the scanner to the contract: raw T1w → registered, skull-stripped T1w, its mask, and its quality ([prep])."""
