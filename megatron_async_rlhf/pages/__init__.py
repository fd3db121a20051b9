"""Pages that need no other file and no network: `layout.html.jinja` for all of them, and what is put into it.

A page of another package is a template beside the code that knows its figures; it extends `pages/layout.html.jinja`.
"""
