# All of jaxchat as an image: training, the page that follows it, chat. compose.yaml builds it. From the repository's root:
#   docker build -t jaxchat-train .
#   docker build -t jaxchat-train:cuda --build-arg VARIANT=cuda .
# serve/Dockerfile is the smaller image of the service alone.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim
# cpu; cuda (13) or cuda12 for NVIDIA GPUs: CUDA's libraries come with JAX, the driver with the host
ARG VARIANT=cpu
WORKDIR /app
COPY requirements.txt ./
RUN python -m venv /opt/venv
RUN case "$VARIANT" in \
      cpu) jax=jax ;; \
      cuda) jax='jax[cuda13]' ;; \
      cuda12) jax='jax[cuda12]' ;; \
      *) echo "VARIANT is cpu, cuda or cuda12, not $VARIANT" >&2; exit 2 ;; \
    esac \
    && /opt/venv/bin/pip install --no-cache-dir -r requirements.txt "$jax"
COPY LICENSE launch.py ./
COPY configs configs
COPY jaxchat jaxchat
COPY train train
COPY serve serve
RUN /opt/venv/bin/python -m compileall -q /app
# a new volume belongs to whom its folder belongs to in the image
RUN mkdir runs cache && chown 10001:10001 runs cache
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 HOME=/tmp GRADIO_TEMP_DIR=/tmp/gradio
USER 10001:10001
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "launch.py"]
CMD ["--tier", "nano", "--cache-dir", "cache"]
