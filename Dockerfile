# Images from one file: the converter, for CI pipelines, the agent, for nodes, the controller of warm pools, and
# what serves on clusters: engines' supervisor and operator.
#
#   docker build --target converter -t glowplug-converter .
#   docker build --target agent -t glowplug-agent .          (--build-arg EXTRAS=agent,s3 for buckets)
#   docker build --target warmpool -t glowplug-warmpool .
#   docker build --target serving -t glowplug-serving .

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
COPY warmpool warmpool
COPY cluster cluster
COPY documents documents
COPY pages pages

# One environment per image, so that the node does not carry what only the converter needs.
FROM build AS converter-build
RUN python3 -m venv /opt/converter && /opt/converter/bin/pip install --no-cache-dir '.[converter,s3]'

FROM build AS warmpool-build
RUN python3 -m venv /opt/warmpool && /opt/warmpool/bin/pip install --no-cache-dir '.[warmpool]'

# With Python, libc and loader of its own: what is copied to hosts finds nothing there.
FROM build AS agent-build
RUN apt-get update \
    && apt-get install -y --no-install-recommends patchelf \
    && rm -rf /var/lib/apt/lists/*
COPY deploy/bundle deploy/bundle
ARG EXTRAS=agent
RUN EXTRAS="$EXTRAS" deploy/bundle/build.sh /opt/glowplug

FROM build AS serving-build
RUN apt-get update \
    && apt-get install -y --no-install-recommends patchelf \
    && rm -rf /var/lib/apt/lists/*
COPY deploy/bundle deploy/bundle
ARG SERVING_EXTRAS=operator,imagefs,s3
RUN EXTRAS="$SERVING_EXTRAS" PACKAGES="glowplug imagefs serving cluster documents pages" deploy/bundle/build.sh /opt/glowplug

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

# Speaks to an API server or to EC2, and to the nodes' agents; what it must keep lies there.
FROM runtime AS warmpool
COPY --from=warmpool-build /opt/warmpool /opt/warmpool
RUN useradd --create-home --uid 65532 glowplug
USER glowplug
# The home may be read-only; compiled models go to /tmp.
ENV NUMBA_CACHE_DIR=/tmp MPLCONFIGDIR=/tmp
ENTRYPOINT ["/opt/warmpool/bin/glowplug"]
CMD ["--help"]

# What deploy/kustomize/serving runs, and what brings the supervisor into replicas' pods, whose images have
# nothing of ours: /opt/glowplug is copied there, with Python, libc and loader of its own.
FROM debian:12-slim AS serving
COPY --from=serving-build /opt/glowplug /opt/glowplug
USER 65532
ENTRYPOINT ["/opt/glowplug/current/bin/glowplug"]
CMD ["--help"]

# What deploy/kustomize runs on each node: it installs the agent on the host, where containers' files must live,
# because what lives in a container dies with it. The command itself is there too, for one-shot jobs.
FROM debian:12-slim AS agent
COPY --from=agent-build /opt/glowplug /opt/glowplug
COPY deploy/bundle/on-host /usr/local/bin/glowplug-on-host
ENTRYPOINT ["/opt/glowplug/current/bin/glowplug"]
CMD ["--help"]
