"""What the interfaces of a vision-language model say of it, for models that no row describes."""
