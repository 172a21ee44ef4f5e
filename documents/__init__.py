"""Documents that people write: YAML, read strictly, with errors that name line, key and remedy.

`reading.load` is the one door. `lines` is YAML with the line of each key, `wording` says what is wrong by the
pydantic model that a document is to be. Called by whoever has such a document (an endpoint, a warm pool, a
router); imports nothing of ours, opens no file. Pure.
"""
