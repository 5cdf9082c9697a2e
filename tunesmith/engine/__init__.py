"""The inference engine: requests in, tokens out. The life of a request is drawn in docs/map.md.

request -> scheduler (queue, admit) -> runner (forward through pages) -> sampling -> text -> completion
"""
