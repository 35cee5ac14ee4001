"""What kind of shift a set of images is, and whether a model is more robust than its accuracy alone would have it."""
