# The server in a container: docs/how-to/deploy.md. Base images are named by argument, so that a hospital's own registry
# and package index can stand in for the public ones.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG EXTRAS=serve,medical
# The builds of PyTorch for this device; for NVIDIA cards, e.g., https://download.pytorch.org/whl/cu130
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG PIP_INDEX_URL=
ARG PIP_TRUSTED_HOST=
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
RUN python -m venv /opt/tmca \
 && PIP_EXTRA_INDEX_URL="${TORCH_INDEX}" PIP_INDEX_URL="${PIP_INDEX_URL:-https://pypi.org/simple}" \
    PIP_TRUSTED_HOST="${PIP_TRUSTED_HOST}" \
    /opt/tmca/bin/pip install --no-cache-dir --constraint constraints.txt ".[${EXTRAS}]"

FROM ${PYTHON_IMAGE}
COPY --from=build /opt/tmca /opt/tmca
ENV PATH=/opt/tmca/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/data \
    TMCA_HOME=/data \
    TMPDIR=/data \
    TMCA_OFFLINE=1
# Nothing but /data is written to, uploads included: a job may have 4 GB, and /tmp may be memory. 10001 is nobody's number
# on the machine around it.
RUN install -d -o 10001 -g 10001 -m 0700 /data
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8000
# Another --port, or https with --tls-certificate, is told here: docker run -e HEALTH_URL=https://127.0.0.1:8443/readyz
ENV HEALTH_URL=http://127.0.0.1:8000/readyz
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import os, ssl, urllib.request as r; r.urlopen(os.environ['HEALTH_URL'], timeout=4, context=ssl._create_unverified_context())"]
ENTRYPOINT ["tmca", "serve", "--host", "0.0.0.0"]
CMD ["--model", "/model"]
