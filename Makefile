# make demo        nine people, and nine drawn faces, from nothing but their 40 attribute logits
# make test        the tests; make test-slow the long ones too
# make train-real  train the networks of real faces: REAL=/path/to/CelebA or CelebAMask-HQ (data/celeba64)
# make page        forty sliders and a face; make test-page its tests, in a browser
# make train-demo  train the demo's SPNN anew; make judge and make prior, its judge and its prior
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
FACES := data/faces_64
LOGS := DDNM/exp/logs/faces

REAL ?= data/celeba64
REAL_IMAGES ?= $(REAL)/CelebA-HQ-img
REAL_LOGS := DDNM/exp/logs/celeba64

.PHONY: demo page test-page test test-slow lint bench train-demo faces judge prior train-real

demo: $(VENV)/ready
	$(RUN) DDNM/main.py --ni --overwrite --config celeba_64.yml --path_y celeba.csv --image_folder people
	$(RUN) DDNM/main.py --ni --overwrite --config faces.yml --path_y faces --image_folder demo
	@echo "Nine people: DDNM/exp/image_samples/people/sheet.png"
	@echo "Nine drawn faces, with their originals: DDNM/exp/image_samples/demo/sheet.png"

$(VENV)/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -c "import sys; sys.exit('Python 3.10 or newer is needed: make demo PYTHON=python3.11') if sys.version_info < (3, 10) else 0"
	$(PYTHON) -m venv $(VENV) || { echo "python3 has no venv: apt install python3-venv, or make demo PYTHON=..."; exit 1; }
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

page: $(VENV)/ready
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-page.txt
	$(RUN) app.py

test-page: $(VENV)/ready
	@command -v chromium >/dev/null || apt-get install -y -qq chromium >/dev/null 2>&1 || true
	@if command -v chromium >/dev/null; then \
		$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-page.txt playwright && \
		$(RUN) -m pytest -q -m page tests/test_page.py; \
	else echo "SKIPPED: the page's tests need Chromium: apt install chromium"; fi

test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/ready
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n auto --dist loadfile --no-loadscope-reorder -m "slow or not slow"

lint: $(VENV)/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy *.py DDNM/*.py DDNM/guided_diffusion/*.py

bench: $(VENV)/ready
	$(RUN) benchmarks/growth.py --threads 2 --json benchmarks/results/growth_cpu.json
	$(RUN) benchmarks/peak_memory.py --json benchmarks/results/memory.json
	$(RUN) benchmarks/speed.py --threads 2 --json benchmarks/results/cpu.json

# --- The demo's networks, from nothing ---

$(FACES)/CelebAMask-HQ-attribute-anno.txt: | $(VENV)/ready
	$(RUN) procedural_faces.py --out $(FACES) --count 20000 --size 64 --seed 0 --overwrite

faces: $(FACES)/CelebAMask-HQ-attribute-anno.txt

train-demo: faces
	@echo "An hour of a CPU core, minutes on a GPU; expect validation accuracy 0.99 (balanced 0.99), img_rec 0.025"
	$(RUN) train_celeba.py --config configs/faces_64.yml --dataset_path $(FACES) --overwrite
	$(RUN) checkpoints.py convert check_points/faces_64/best_model_r_opt_real.pth $(LOGS)/spnn.safetensors --dtype float16
	cp check_points/faces_64/config.json $(LOGS)/spnn.json

data/faces_10k/CelebAMask-HQ-attribute-anno.txt: | $(VENV)/ready
	$(RUN) procedural_faces.py --out data/faces_10k --count 10000 --size 64 --seed 0 --overwrite

judge: data/faces_10k/CelebAMask-HQ-attribute-anno.txt
	$(RUN) judge.py --dataset_path data/faces_10k --out check_points/judge_64.safetensors --overwrite \
		--img_size 64 --epochs 10 --batch_size 128 --lr 2e-3 --seed 0 --dtype float16
	for suffix in json safetensors; do cp check_points/judge_64.$$suffix $(LOGS)/judge.$$suffix; done

prior: faces
	$(RUN) DDNM/train_prior.py --images $(FACES)/CelebA-HQ-img --out check_points/prior_64 --img_size 64 --overwrite \
		--steps 18000 --batch_size 16 --lr 7e-4 --save_every 400 --save_dtype float16 --seed 0
	mkdir -p $(LOGS)/prior
	cp check_points/prior_64/*config.json check_points/prior_64/diffusion_pytorch_model.safetensors $(LOGS)/prior/

# --- The networks of real faces, from photographs of your own (weights of CelebA: non-commercial research only) ---

REAL_SPNN = $(RUN) train_celeba.py --config configs/celeba_64.yml --dataset_path $(REAL) --resume \
	--teachers check_points/teacher_2.safetensors check_points/teacher_3.safetensors check_points/teacher_5.safetensors

train-real: | $(VENV)/ready
	@test -d $(REAL_IMAGES) || { echo "$(REAL_IMAGES): no such folder; make train-real REAL=/path/to/CelebAMask-HQ [REAL_IMAGES=its images]"; exit 2; }
	@echo "Half an hour on a GPU, a night on 2 CPU cores; when it is stopped, the same command goes on"
	for seed in 2 3 5; do $(RUN) judge.py --dataset_path $(REAL) --out check_points/teacher_$$seed.safetensors --resume \
		--img_size 64 --epochs 45 --batch_size 128 --lr 3e-3 --weight_decay 0.05 --augment 1 --seed $$seed \
		--dtype float16 || exit; done
	$(REAL_SPNN) --no-is_r_opt
	$(REAL_SPNN) --no-is_r_opt --checkpoint_dir check_points/celeba_64_2 \
		--init check_points/celeba_64/best_model.pth --lr 8e-4 --epoch 36
	$(REAL_SPNN) --checkpoint_dir check_points/celeba_64_3 \
		--init check_points/celeba_64_2/best_model.pth --lr 1.5e-4 --epoch 4 --balance 0.2
	$(RUN) checkpoints.py convert check_points/celeba_64_3/best_model_r_opt_real.pth $(REAL_LOGS)/spnn.safetensors --dtype float16
	cp check_points/celeba_64_3/config.json $(REAL_LOGS)/spnn.json
	$(RUN) judge.py --dataset_path $(REAL) --out check_points/judge_celeba64.safetensors --resume --img_size 64 \
		--epochs 60 --batch_size 128 --lr 3e-3 --weight_decay 0.05 --augment 1 --seed 1 --dtype float16
	for suffix in json safetensors; do cp check_points/judge_celeba64.$$suffix $(REAL_LOGS)/judge.$$suffix; done
	$(RUN) DDNM/train_prior.py --images $(REAL_IMAGES) --split train --out check_points/prior_celeba64 --resume --img_size 64 \
		--channels 64,128,128 --layers 2 --attention_size 16 --dropout 0.1 --augment 0.5 --steps 6400 --batch_size 256 \
		--lr 1e-3 --warmup 400 --precision bf16 --save_dtype float16
	mkdir -p $(REAL_LOGS)/prior
	cp check_points/prior_celeba64/*config.json check_points/prior_celeba64/diffusion_pytorch_model.safetensors $(REAL_LOGS)/prior/
