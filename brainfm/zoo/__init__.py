"""Publications as data: a card a publication, read by `cards`."""
