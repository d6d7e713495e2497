"""What vtok tells about a model, as result objects that print themselves."""
