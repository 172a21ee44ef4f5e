"""The request log: a sample of an engine's requests with their bodies, written to Parquet, never waited for.

    vLLM's API servers (gate), or the supervisor (proxy)          a process of its own
      `recorder`: samples, keeps bounded bodies          ---->      `writer`: Parquet by `files` and `columns`
                  <- settings, as a frame on the same unix socket   `upload`: S3

`keeper`, in the supervisor, owns the socket and the writer process; `record` is what is said on the socket,
`sampling` which requests are chosen (both pure).

Why a process: vLLM's interpreter has its own pins and perhaps no pyarrow; the supervisor carries the requests
of command engines on its event loop, where pyarrow's work would hold them up; and a log that takes all memory
or dies takes nothing with it. Why sockets: what has no room in a recorder's send buffer is dropped and
counted, there and then, so that a slow disk is a gap in the log and nothing else.
"""
