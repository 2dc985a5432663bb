"""Proof, on the user's own stack, that a step's numbers do not depend on how the step is carried out."""
