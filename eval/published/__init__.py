"""Published operating points, and what is measured beside them."""
