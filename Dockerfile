# The program alone, on a distribution without a shell, as a user without rights.
#
#   docker build -t tollgate .
#   docker run -p 8080:8080 -v tollgate:/var/lib/tollgate -v ./conf:/etc/tollgate:ro tollgate run -c /etc/tollgate/tollgate.yaml
#
# A container is upgraded by replacing it: the new program cannot take over in another container. Its state is in the volume.
FROM rust:1.95-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends cmake && rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY Cargo.toml Cargo.lock askama.toml ./
COPY benches benches
COPY conf conf
COPY src src
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/build/target \
    cargo build --release --locked --bin tollgate && install -D target/release/tollgate /out/usr/bin/tollgate && \
    install -d -m 0700 /out/var/lib/tollgate

FROM gcr.io/distroless/cc-debian12:nonroot
COPY --from=build --chown=nonroot:nonroot /out /
COPY LICENSE /usr/share/doc/tollgate/copyright
USER nonroot
VOLUME /var/lib/tollgate
EXPOSE 8080 8081
HEALTHCHECK --interval=10s --timeout=5s CMD ["/usr/bin/tollgate", "healthcheck"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["/usr/bin/tollgate"]
CMD ["run", "-c", "/etc/tollgate/tollgate.yaml"]
