# Two images from one file: the converter, for CI pipelines, and the agent, for nodes.
#
#   docker build --target converter -t glowplug-converter .
#   docker build --target agent -t glowplug-agent .

FROM debian:12-slim AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY glowplug glowplug
COPY imagefs imagefs
COPY converter converter
# One environment per image, so that the node does not carry what only the converter needs.
RUN python3 -m venv /opt/converter && /opt/converter/bin/pip install --no-cache-dir '.[converter,s3]'
RUN python3 -m venv /opt/agent && /opt/agent/bin/pip install --no-cache-dir '.[imagefs,s3,fuse-files]'

FROM debian:12-slim AS runtime
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/*

# Reads and writes registries and buckets only: no privileges, a scratch directory to spool layers in.
FROM runtime AS converter
COPY --from=build /opt/converter /opt/converter
RUN useradd --create-home --uid 65532 glowplug
USER glowplug
WORKDIR /home/glowplug
ENTRYPOINT ["/opt/converter/bin/glowplug"]
CMD ["--help"]

# Mounts: needs CAP_SYS_ADMIN, /dev/fuse, and shared propagation of what it mounts for others, so it runs as
# root. What lives in a container dies with it: on a node, prefer host units; use this for one-shot jobs.
FROM runtime AS agent
RUN apt-get update \
    && apt-get install -y --no-install-recommends fuse3 util-linux \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/agent /opt/agent
VOLUME /var/lib/glowplug
ENTRYPOINT ["/opt/agent/bin/glowplug"]
CMD ["--help"]
