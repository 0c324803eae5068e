"""What a problem is: MDPs, what is checked of them, their normal form, their files."""
