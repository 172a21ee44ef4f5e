# Two images from one file: the converter, for CI pipelines, and the agent, for nodes.
#
#   docker build --target converter -t glowplug-converter .
#   docker build --target agent -t glowplug-agent .          (--build-arg EXTRAS=agent,s3 for buckets)

FROM debian:12-slim AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY glowplug glowplug
COPY imagefs imagefs
COPY agent agent
COPY converter converter
COPY serving serving

# One environment per image, so that the node does not carry what only the converter needs.
FROM build AS converter-build
RUN python3 -m venv /opt/converter && /opt/converter/bin/pip install --no-cache-dir '.[converter,s3]'

# With Python, libc and loader of its own: what is copied to hosts finds nothing there.
FROM build AS agent-build
RUN apt-get update \
    && apt-get install -y --no-install-recommends patchelf \
    && rm -rf /var/lib/apt/lists/*
COPY deploy/bundle deploy/bundle
ARG EXTRAS=agent
RUN EXTRAS="$EXTRAS" deploy/bundle/build.sh /opt/glowplug

FROM debian:12-slim AS runtime
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/*

# Reads and writes registries and buckets only: no privileges, a scratch directory to spool layers in.
FROM runtime AS converter
COPY --from=converter-build /opt/converter /opt/converter
RUN useradd --create-home --uid 65532 glowplug
USER glowplug
WORKDIR /home/glowplug
ENTRYPOINT ["/opt/converter/bin/glowplug"]
CMD ["--help"]

# What deploy/kustomize runs on each node: it installs the agent on the host, where containers' files must live,
# because what lives in a container dies with it. The command itself is there too, for one-shot jobs.
FROM debian:12-slim AS agent
COPY --from=agent-build /opt/glowplug /opt/glowplug
COPY deploy/bundle/on-host /usr/local/bin/glowplug-on-host
ENTRYPOINT ["/opt/glowplug/current/bin/glowplug"]
CMD ["--help"]
