"""Joint graphs: what torch hands over, how it is read, walked and edited, and what each operator is."""
