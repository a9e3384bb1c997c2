# Operator, gateway, tuner and the Jobs of the chart: one image, `python -m moe_operator` and the like as its commands.
#   docker buildx build --sbom=true --provenance=true -f images/control.Dockerfile -t YOUR/moestack:0.1.0 --push .
# Name the base by digest (--build-arg PYTHON=python@sha256:…) for an image that can be built again bit for bit.
ARG PYTHON=python:3.11-slim
FROM ${PYTHON} AS build
ARG SOURCE_DATE_EPOCH=0
ENV SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH}
WORKDIR /src
COPY . .
RUN images/install-control /opt/moestack

FROM ${PYTHON}
COPY --from=build /opt/moestack /opt/moestack
ENV PATH=/opt/moestack/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 65532:65532
WORKDIR /
CMD ["python", "-m", "moe_operator", "--help"]
