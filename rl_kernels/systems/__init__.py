"""Systems trained with Replacement Learning, on data that needs no download."""
