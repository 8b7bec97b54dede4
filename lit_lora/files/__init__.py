"""Files that are whole or not there, and files of others read without trusting them."""
