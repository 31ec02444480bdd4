"""What is made of a bundle for the places where it runs: one file a kind of package, and the code that is shipped."""
