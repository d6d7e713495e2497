"""Vision towers inside vision-language models: what they yield, and what is read in them."""
