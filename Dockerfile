# dist_llm on NVIDIA GPUs: torch brings its own CUDA libraries, and the host its driver (NVIDIA container toolkit).
#
#   docker build --tag dist-llm .
#   docker run --gpus all --ipc host --volume "$PWD:/work" dist-llm train --config demo
#
# The full Python image has the C compiler that torch.compile needs.
FROM python:3.12
COPY pyproject.toml constraints.txt README.md LICENSE /opt/dist_llm/
COPY dist_llm /opt/dist_llm/dist_llm
RUN pip install --no-cache-dir --constraint /opt/dist_llm/constraints.txt /opt/dist_llm
WORKDIR /work
ENTRYPOINT ["dist-llm"]
