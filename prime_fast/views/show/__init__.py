"""Responses, token by token: record.py what is known of one, page.py and page.html to look at, picture.py to print."""
