# keygate in a container: `docker build -t keygate .`, then mount a configuration at /etc/keygate and a token's module.
# `docker build --target demo -t keygate-demo .` adds SoftHSM; the demo listens on loopback only, so
# `docker run --network host keygate-demo`.
# It runs as 10001:10001 and writes nothing: `--read-only`, `--cap-drop ALL` and `--security-opt no-new-privileges` are fine.
# The demo needs `--tmpfs /tmp`.
ARG RUST_IMAGE=rust:1.95-bookworm
ARG NODE_IMAGE=node:26-bookworm
ARG BASE=debian:bookworm-slim

FROM ${RUST_IMAGE} AS engine
WORKDIR /build
COPY src/engine src/engine
RUN cargo build --release --locked --manifest-path src/engine/Cargo.toml \
 && mv src/engine/target/release/libkeygate_engine.so src/engine/keygate-engine.node && rm -r src/engine/target

# The packages of the build in all_modules, those of the program in node_modules.
FROM ${NODE_IMAGE} AS packages
RUN apt-get update && apt-get install -y --no-install-recommends g++ make python3
WORKDIR /build
COPY package.json package-lock.json .npmrc ./
COPY scripts/packages scripts/
RUN scripts/packages && cp -a node_modules all_modules && npm prune --omit=dev --ignore-scripts
# A third of Node is symbols, of the packages it is what only compilers and debuggers read.
RUN strip node_modules/node-linux-*/bin/node && cd node_modules \
 && rm -r node-linux-*/include node-linux-*/share node-linux-*/CHANGELOG.md .package-lock.json .keygate-installed \
 && find . -type f '(' -name '*.map' -o -name '*.d.ts' -o -name '*.d.mts' -o -name '*.d.cts' ')' -delete \
 && cd pkcs11js && find . -mindepth 1 -not -path './build*' -not -name package.json -not -name 'index.js' -not -name 'LICENSE*' -delete \
 && find build -mindepth 1 -not -path build/Release -not -name pkcs11.node -delete

# Cargo and Node together: the lists of parts and licences are about both.
FROM engine AS build
ARG REVISION=""
COPY . .
COPY --from=packages /build/all_modules node_modules
RUN export KEYGATE_REVISION="$REVISION" \
 && for script in build sbom licences; do node_modules/.bin/node scripts/$script.ts || exit; done

FROM ${BASE} AS runtime
RUN apt-get update && apt-get install -y --no-install-recommends libatomic1 && rm -rf /var/lib/apt/lists/* /var/log/* /var/cache/* \
 && useradd --system --uid 10001 --user-group --home-dir /nonexistent --shell /usr/sbin/nologin keygate \
 && ln -s /opt/keygate/bin/keygate /usr/local/bin/keygate
COPY --from=packages /build/node_modules /opt/keygate/node_modules
COPY --from=build /build/dist /opt/keygate/dist
COPY bin /opt/keygate/bin
COPY package.json LICENSE /opt/keygate/
# A number, by which Kubernetes can tell that it is not root.
USER 10001:10001
# Where the configuration has its `admin.listen`, for the health check.
ENV KEYGATE_ADMIN=http://127.0.0.1:9180
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s CMD ["/opt/keygate/node_modules/.bin/node", "-e", \
  "require('node:http').get(process.env.KEYGATE_ADMIN + '/ready', ({ statusCode }) => process.exit(statusCode === 200 ? 0 : 1)).on('error', () => process.exit(1))"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["keygate"]
CMD ["serve", "-c", "/etc/keygate/keygate.yaml"]
ARG VERSION=""
ARG REVISION=""
LABEL org.opencontainers.image.title="keygate" \
      org.opencontainers.image.description="TLS offloader whose private keys never leave a PKCS#11 HSM" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"

FROM runtime AS demo
USER root
# p11-kit puts the token behind a socket, for the demo of native-config/kubernetes.
RUN apt-get update && apt-get install -y --no-install-recommends softhsm2 p11-kit p11-kit-modules \
 && rm -rf /var/lib/apt/lists/* /var/log/* /var/cache/* && ln -s /usr/lib/*/pkcs11/p11-kit-client.so /usr/lib/p11-kit-client.so
USER 10001:10001
ENV XDG_STATE_HOME=/tmp
CMD ["demo"]

# The default is the image without a demo in it.
FROM runtime
