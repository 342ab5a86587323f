# The server and a model in one image. The context is the model's folder:
#   docker build -f deploy/model.Dockerfile -t tmca-polyps runs/polyps/checkpoints/best
ARG TMCA_IMAGE=tmca:latest
FROM ${TMCA_IMAGE}
COPY . /model
