"""Tables, one module each, from the frame of runs."""
