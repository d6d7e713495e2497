"""Methods that choose among the frames and tokens of videos, before the language model reads them."""
