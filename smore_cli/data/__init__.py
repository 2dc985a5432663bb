"""Data: from sources named in a recipe to tokenised rows and batches, with what is learned marked token by token."""
