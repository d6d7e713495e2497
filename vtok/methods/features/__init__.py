"""Methods that choose among the image features of a prompt, before the language model reads it."""
