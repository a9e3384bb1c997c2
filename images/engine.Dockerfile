# Engines: a stock image that holds vLLM 0.32 and Ray Serve 2.60, and our plugin. The base is yours to name, since it
# depends on your accelerators:
#   docker buildx build --sbom=true -f images/engine.Dockerfile --build-arg BASE=YOUR/ray-llm@sha256:… -t YOUR/engine:0.1.0 --push .
ARG BASE
ARG PYTHON=python:3.11-slim
FROM ${PYTHON} AS build
ARG SOURCE_DATE_EPOCH=0
ENV SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH}
WORKDIR /src
COPY . .
RUN images/build-wheel /dist

FROM ${BASE}
COPY --from=build /dist /tmp/dist
COPY requirements/engine.txt images/check-engine /tmp/
# --no-deps: nothing of the engine's own may change. What it then lacks, the check names, and the build fails.
RUN python -m pip install --no-cache-dir --no-deps --require-hashes -r /tmp/engine.txt \
 && python -m pip install --no-cache-dir --no-deps /tmp/dist/*.whl \
 && python /tmp/check-engine
