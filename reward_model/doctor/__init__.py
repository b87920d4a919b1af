"""A doctor for the data: what is wrong with preferences before anything is trained on them."""
