# keygate in a container: `docker build -t keygate .`, then mount a configuration at /etc/keygate and a token's module.
# `docker build --target demo -t keygate-demo .` adds SoftHSM; the demo listens on loopback only, so
# `docker run --network host keygate-demo`.
ARG RUST_IMAGE=rust:1.95-bookworm
ARG NODE_IMAGE=node:20-bookworm-slim
ARG BASE=debian:bookworm-slim

FROM ${RUST_IMAGE} AS engine
WORKDIR /build
COPY src/engine src/engine
RUN cargo build --release --locked --manifest-path src/engine/Cargo.toml

FROM ${NODE_IMAGE} AS packages
RUN apt-get update && apt-get install -y --no-install-recommends g++ make python3 && rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY . .
RUN scripts/packages && npm run build && npm prune --omit=dev
COPY --from=engine /build/src/engine/target/release/libkeygate_engine.so dist/engine/keygate-engine.node

FROM ${BASE} AS runtime
RUN apt-get update && apt-get install -y --no-install-recommends libatomic1 && rm -rf /var/lib/apt/lists/* \
 && useradd --system --home-dir /nonexistent --shell /usr/sbin/nologin keygate
COPY --from=packages /build/node_modules /opt/keygate/node_modules
COPY --from=packages /build/dist /opt/keygate/dist
COPY --from=packages /build/bin /opt/keygate/bin
COPY --from=packages /build/package.json /opt/keygate/
RUN ln -s /opt/keygate/bin/keygate /usr/local/bin/keygate
USER keygate
ENTRYPOINT ["keygate"]
CMD ["serve", "-c", "/etc/keygate/keygate.yaml"]

FROM runtime AS demo
USER root
RUN apt-get update && apt-get install -y --no-install-recommends softhsm2 && rm -rf /var/lib/apt/lists/*
USER keygate
ENV XDG_STATE_HOME=/tmp
CMD ["demo"]

# The default is the image without a demo in it.
FROM runtime
