"""Questions with choices, of which a letter is the answer; a file each."""
