"""The pictures of the page, in a number of bytes that is given."""
