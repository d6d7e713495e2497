"""Methods that drop visual tokens between the layers of a language model."""
