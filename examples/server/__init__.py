"""A server of many adapters over one model, in rooms of their own; ``examples/serve.py`` is its entry.

``app`` speaks HTTP and knows no tensor, in the words of ``protocol``; ``engine`` decodes requests together and knows no
HTTP; ``cache`` holds the keys and values of what is decoded; ``text`` turns tokens into text as they come; adapters lie
in ``folder``; ``metrics`` is what is counted.
"""
