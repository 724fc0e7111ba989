"""An HTTP server over one bundle: videos in, groundings out, within limits. Started by `python cli.py serve`.

`run` binds and serves, `app` builds the routes, `service` is their shared state. It needs the extra `serve`; importing
this package alone imports nothing of it.
"""
