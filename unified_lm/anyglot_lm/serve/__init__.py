"""An HTTP server with OpenAI's shapes over a unified model: `anyglot serve`.

A request passes `connection` (slow clients), `guard` (key, size, time), `protocol` (its shape), `incoming` and
`prepare` (media and text to a prompt), `batcher` (the engine's thread) and `answers` (ids to JSON and bytes); `app`
ties them together, `limits` bounds them all. A web page stands beside the API: `gate` guards it, `page` lays it out,
`talk` answers there and `spans` draws ids. Importing this package loads none of them.
"""
