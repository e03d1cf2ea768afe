"""Three revisions, as a later version of this package may have them."""
