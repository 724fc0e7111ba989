"""A server over one bundle: videos in, groundings out, with limits. Started by `python cli.py serve`.

`run` binds and serves, `app` builds the routes, `service` holds what they share. Needs the extra `serve`; nothing of it
is imported here.
"""
