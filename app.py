"""A page on which forty attributes are sliders and a face answers.

    make page                                  # or: pip install -r requirements-page.txt && python app.py
    python app.py --config faces.yml           # other weights, by the flags of DDNM/main.py

It listens on the loopback address and prints it. Pictures travel inside the page: nothing is written to disk but an
upload, which is deleted as soon as it is read.
"""

import base64
import io
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from html import escape
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from DDNM.guided_diffusion.diffusion import image_generator, sampling
from DDNM.guided_diffusion.edits import CONTRADICTION
from DDNM.guided_diffusion.guidance import RuleSettings
from DDNM.guided_diffusion.inputs import (
    CONFIGS,
    OF_MAIN,
    PRESET_ONLY,
    Networks,
    NetworkSettings,
    TargetSettings,
    WalkSettings,
    load_networks,
    read_targets,
)
from images import can_align, load_image, to_float, to_picture, to_uint8
from metrics import agreement
from utils import InputError, option, parse, resolve_device, run_command

GROUPS = {
    "Hair": "Bald Bangs Black_Hair Blond_Hair Brown_Hair Gray_Hair Receding_Hairline Straight_Hair Wavy_Hair",
    "Face": "Male Young Attractive Big_Nose Blurry Chubby Double_Chin Heavy_Makeup High_Cheekbones Oval_Face "
            "Pale_Skin Pointy_Nose Rosy_Cheeks",
    "Eyes": "Arched_Eyebrows Bags_Under_Eyes Bushy_Eyebrows Narrow_Eyes",
    "Mouth": "Smiling Mouth_Slightly_Open Big_Lips Wearing_Lipstick",
    "Beard": "No_Beard 5_o_Clock_Shadow Goatee Mustache Sideburns",
    "Things worn": "Eyeglasses Wearing_Earrings Wearing_Hat Wearing_Necklace Wearing_Necktie",
}  # fmt: skip
CHANGES = {  # what a button sets: attributes to their typical logits with (+) and without (-) them
    "blond": "+Blond_Hair -Black_Hair -Brown_Hair -Gray_Hair -Bald",
    "dark hair": "+Black_Hair -Blond_Hair -Brown_Hair -Gray_Hair -Bald",
    "glasses": "+Eyeglasses",
    "smiling": "+Smiling +Mouth_Slightly_Open +High_Cheekbones",
    "serious": "-Smiling -Mouth_Slightly_Open -High_Cheekbones",
    "a beard": "+Goatee +Mustache +Sideburns -No_Beard +Male",
    "a hat": "+Wearing_Hat",
    "old": "+Gray_Hair -Young -Black_Hair -Brown_Hair -Blond_Hair",
    "young": "+Young -Gray_Hair -Bald -Receding_Hairline",
    "made up": "+Heavy_Makeup +Wearing_Lipstick",
}
RULES = ("nlbp+gradient", "nlbp", "gradient", "none")
NAME = "face"  # of every picture: its noise comes of the seed and this
SHOWN_EVERY = 5  # evaluations of the prior between two pictures of one that is being drawn
LARGEST_UPLOAD = "10mb"
# keys of presets that the page has no flag for
COMMAND_ONLY = (*PRESET_ONLY, *OF_MAIN, "path_y")


@dataclass(frozen=True)
class Page:
    """Page."""

    config: Path = option(Path("celeba_64.yml"), "preset: a file under DDNM/configs, or a path; flags given here win")
    host: str | None = option(None, "address to listen on, 0.0.0.0 lets other machines in (default: loopback only)")
    port: int | None = option(None, "default: the first free one from 7860", 1, 65535)
    waiting: int = option(64, "visitors that may wait for their picture", 1, 10_000)
    steps: int = option(50, "T_sampling at first", 1, 1000)
    faces: str = option("celeba.csv", "faces to start from, as --path_y of DDNM/main.py")
    contradiction: float = option(CONTRADICTION, "what follows a button, as --set of DDNM/main.py has it", 0, 1)


@dataclass(frozen=True)
class Wish:
    """What a picture is drawn from: logits by attribute, the seed of its noise, the number of steps, and the rule."""

    logits: tuple[float, ...]
    seed: int
    steps: int
    rule: str

    def link(self) -> str:
        """As the query of a link."""
        content = json.dumps([[round(y, 4) for y in self.logits], self.seed, self.steps, self.rule])
        return "?state=" + base64.urlsafe_b64encode(content.encode()).decode()

    @classmethod
    def from_link(cls, state: str, ranges: Sequence[tuple[float, float]]) -> "Wish":
        """Raises InputError: no state of this page, whose sliders have these ranges."""
        try:
            logits, seed, steps, rule = json.loads(base64.urlsafe_b64decode(state.encode()))
            wish = cls(tuple(map(float, logits)), int(seed), int(steps), str(rule))
            inside = [low <= y <= high for y, (low, high) in zip(wish.logits, ranges, strict=True)]
            if not all(inside) or wish.rule not in RULES or not 1 <= wish.steps <= 1000 or not 0 <= wish.seed < 2**31:
                raise ValueError
        except (ValueError, TypeError, OverflowError, RecursionError):
            raise InputError("the link holds no state of this page") from None
        return wish


class Studio:
    """What draws for all visitors; it keeps nothing of any of them.

    Args:
        networks: on one device.
        rule, walk: the preset's; a wish brings its own rule, steps and seed.
        page: the page's own settings. flags: what was given beside them, for command lines.
    """

    def __init__(
        self, networks: Networks, rule: RuleSettings, walk: WalkSettings, page: Page, flags: Sequence[str] = ()
    ) -> None:
        self.networks, self.rule, self.walk, self.page, self.flags = networks, rule, walk, page, tuple(flags)
        self.attributes = networks.attributes
        typical = networks.spnn.notes.get("typical_logits") or [[-8.0, 8.0]] * len(self.attributes)
        self.typical = [(round(without, 1), round(present, 1)) for without, present in typical]
        targets = read_targets(TargetSettings(path_y=page.faces), networks, 16)
        rows = [tuple(round(y, 1) for y in logits) for logits in targets.logits.tolist()]
        self.faces = dict(zip(targets.names, rows, strict=True))
        self.range = []  # of each slider: well beyond the typical values and those of the faces
        for values in zip(*zip(*self.typical, strict=True), *rows, strict=True):
            reach = max(values) - min(values)
            self.range.append((round(min(values) - reach / 2, 1), round(max(values) + reach / 2, 1)))

    def on_sliders(self, logits: Sequence[float]) -> list[float]:
        """Logits as sliders can have them."""
        return [round(min(max(y, low), high), 1) for y, (low, high) in zip(logits, self.range, strict=True)]

    def changed(self, change: str, logits: Sequence[float]) -> list[float]:
        """The sliders after a button of `CHANGES`; the others follow as they do after --set."""
        typical = dict(zip(self.attributes, self.typical, strict=True))
        words = [word for word in CHANGES[change].split() if word[1:] in typical]
        edits = [f"{word[1:]}={typical[word[1:]][word[0] == '+']}" for word in words]
        edited = self.networks.edits(edits, self.page.contradiction)
        return self.on_sliders(edited.apply(torch.tensor([logits]))[0][0].tolist())

    def natural(self, logits: Sequence[float]) -> Tensor:
        """``g'(y)``, (3, S, S)."""
        with torch.inference_mode():
            return self.networks.operator.pinv(torch.tensor([logits], device=self.networks.device))[0].cpu()

    def seen(self, image: Tensor) -> dict[str, Tensor]:
        """What g and, if there is one, the judge see in a picture, (3, S, S): (d,) logits each."""
        x = to_float(to_uint8(image))[None].to(self.networks.device)  # as it is saved
        who = {"g": self.networks.operator.A} | ({} if self.networks.judge is None else {"judge": self.networks.judge})
        with torch.inference_mode():
            return {name: network(x)[0].cpu() for name, network in who.items()}

    def draw(self, wish: Wish) -> Iterator[tuple[float, Tensor]]:
        """(share done, x0) at every fifth step or so, the last one the picture, (3, S, S)."""
        n, rule = self.networks, replace(self.rule, guidance=wish.rule).build(wish.steps)
        total = rule.evaluations(n.prior.schedule, wish.steps, **self.walk.travel)
        target = torch.tensor([wish.logits], device=n.device)
        drawing = sampling(
            n.prior, [image_generator(wish.seed, NAME)], n.device, n.operator, target, rule, steps=wish.steps,
            eta=self.walk.eta, clip_x0=self.walk.clip_x0, **self.walk.travel,
        )  # fmt: skip
        for count, (_, x0) in enumerate(drawing, 1):
            if count % SHOWN_EVERY == 0 or count == total:
                yield count / total, x0[0].cpu()

    def picture(self, wish: Wish) -> Tensor:
        """The finished picture, (3, S, S)."""
        return list(self.draw(wish))[-1][1]

    def table(self, wish: Wish) -> str:
        """A table of logits that DDNM/main.py reads."""
        return ",".join(["name", *self.attributes]) + "\n" + ",".join([NAME, *(f"{y:.9g}" for y in wish.logits)]) + "\n"

    def command(self, wish: Wish) -> str:
        """The command that draws exactly this picture from `table`, saved as face.csv."""
        words = ["python", "DDNM/main.py", "--ni", "--config", str(self.page.config), *self.flags,
                 "--path_y", f"{NAME}.csv", "--image_folder", "page", "--overwrite", "--no-base_rate",
                 "--batch_size", "1", "--steps", str(wish.steps), "--seed", str(wish.seed),
                 "--guidance", wish.rule]  # fmt: skip
        return shlex.join(words)


# --- What a visitor sees ---------------------------------------------------------------------------------------------

STYLE = """
@media (max-width: 700px) {.columns {flex-direction: column-reverse}}
.columns pre {white-space: pre-wrap; font-size: 13px}
.small .pic {max-width: 160px}
.pic {margin: 0; display: inline-block; vertical-align: top; width: 100%; max-width: 320px}
.pic img {width: 100%; aspect-ratio: 1; border-radius: 8px; background: #e6e8ec}
.pic figcaption {font-size: 14px; margin: 4px 0 10px}
.strip {display: grid; grid-template-columns: repeat(auto-fit, minmax(128px, 1fr)); gap: 12px; max-width: 1000px}
.chips span {display: inline-block; font-size: 12px; margin: 2px; padding: 1px 7px; border-radius: 9px;
             border: 2px solid transparent; background: #e6e8ec; color: #1e2026}
.chips .yes {background: #1e2026; color: white}
.chips .differs {border-color: #d63c32}
"""


def data_uri(image: Tensor) -> str:
    """(3, S, S) in [-1, 1] as a PNG inside the page."""
    out = io.BytesIO()
    to_picture(image).save(out, format="PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def figure(image: Tensor, caption: str, save: str | None = None) -> str:
    """A picture with its caption, which is its text for a screen reader too; and a link that saves it."""
    uri = data_uri(image)
    link = f' · <a download="{escape(save)}.png" href="{uri}">save</a>' if save is not None else ""
    return (f'<figure class="pic"><img src="{uri}" alt="{escape(caption)}">'
            f"<figcaption>{escape(caption)}{link}</figcaption></figure>")  # fmt: skip


def chips(title: str, attributes: Sequence[str], logits: Tensor, target: Sequence[float]) -> str:
    """Attributes as chips, dark if present, framed and named if they differ from the target."""
    cells = []
    for name, y, wanted in zip(attributes, logits.tolist(), target, strict=True):
        yes, differs = y > 0, (y > 0) != (wanted > 0)
        if yes or differs:
            text = name.replace("_", " ") + (f" ({'added' if yes else 'missing'})" if differs else "")
            cells.append(f'<span class="{"yes" if yes else ""} {"differs" if differs else ""}">{escape(text)}</span>')
    share = agreement(logits, torch.tensor(target))
    return f'<div class="chips"><b>{escape(title)}</b>, {share:.0%} as wanted<br>{"".join(cells)}</div>'


def verdicts(studio: Studio, image: Tensor, target: Sequence[float]) -> str:
    titles = {"g": "g sees", "judge": "An independent judge sees"}
    return "".join(chips(titles[who], studio.attributes, y, target) for who, y in studio.seen(image).items())


def recipe(studio: Studio, wish: Wish) -> str:
    """How to make the same picture again: the table of logits to save, and the command."""
    uri = "data:text/csv;base64," + base64.b64encode(studio.table(wish).encode()).decode()
    return (f'<p><a download="{NAME}.csv" href="{uri}">save the logits</a>, then the command that draws the same '
            f"picture, bit by bit on one machine:</p><pre>{escape(studio.command(wish))}</pre>")  # fmt: skip


def agreements(studio: Studio, image: Tensor, target: Sequence[float]) -> str:
    """A line of figures under a picture."""
    return ", ".join(f"{who} {agreement(y, torch.tensor(target)):.0%}" for who, y in studio.seen(image).items())


def grouped(attributes: Sequence[str]) -> dict[str, list[int]]:
    """Indices of attributes by group; those of other weights in one of their own."""
    groups = {title: [attributes.index(n) for n in names.split() if n in attributes] for title, names in GROUPS.items()}
    known = {index for group in groups.values() for index in group}
    groups["Attributes"] = [index for index in range(len(attributes)) if index not in known]
    return {title: group for title, group in groups.items() if group}


# --- What happens ----------------------------------------------------------------------------------------------------


def wish_of(values: Sequence) -> Wish:
    """Of what stands in the controls: logits, seed, steps, rule."""
    *logits, seed, steps, rule = values
    return Wish(tuple(map(float, logits)), int(seed or 0), int(steps), rule)


class Events:
    """What answers the controls, with HTML. Those that draw are generators; an InputError goes to the visitor."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio

    def natural(self, *logits: float) -> str:
        return figure(self.studio.natural(logits), "g'(y): the natural pseudo-inverse, in one pass", "natural")

    def draw(self, address: str, *values) -> Iterator[tuple[str, str, str, str]]:
        wish = wish_of(values)
        link = f"{address.rstrip('/')}/{wish.link()}"
        for share, image in self.studio.draw(wish):
            if share < 1:
                yield figure(image, f"x0 after {share:.0%}"), "", "", link
        yield (figure(image, f"{wish.rule}, {wish.steps} steps, seed {wish.seed}", NAME),
               verdicts(self.studio, image, wish.logits), recipe(self.studio, wish), link)  # fmt: skip

    def read_portrait(self, path: str | None) -> Iterator[tuple]:
        """The portrait, what g sees in it, and the sliders at that."""
        if path is None:
            raise InputError("choose a portrait first")
        size, told = self.studio.networks.image_size, ""
        try:
            if not can_align():
                told = "It was not aligned (pip install -r requirements-align.txt)."
            try:
                image = load_image(path, size, align=can_align())
            except InputError as error:
                image, told = load_image(path, size), f"It is used as it is: {without_path(error, path)}"
        except InputError as error:
            raise InputError(without_path(error, path)) from None
        finally:
            Path(path).unlink(missing_ok=True)
        logits = self.studio.on_sliders(self.studio.seen(image)["g"].tolist())
        yield figure(image, f"the portrait. {told}"), logits, *logits

    def edit(self, portrait: list[float] | None, *values) -> Iterator[tuple[str, str, str]]:
        if portrait is None:
            raise InputError("choose a portrait first")
        wish, studio = wish_of(values), self.studio
        for share, image in studio.draw(wish):
            if share < 1:
                yield figure(image, f"x0 after {share:.0%}"), "", ""
        before, after = torch.tensor(portrait), studio.seen(image)["g"]
        kept = [i for i, y in enumerate(wish.logits) if (y > 0) == (portrait[i] > 0)]
        flipped = [studio.attributes[i].replace("_", " ") for i in kept if (before[i] > 0) != (after[i] > 0)]
        told = f"Of the {len(kept)} attributes that were to stay, {len(flipped)} changed by g"
        told += f": {', '.join(flipped)}." if flipped else "."
        yield (figure(image, "the edited face", "edited"), figure(studio.natural(wish.logits), "g'(y)", "natural"),
               f"<p>{escape(told)}</p>" + verdicts(studio, image, wish.logits) + recipe(studio, wish))  # fmt: skip

    def strip(self, wishes: Iterable[tuple[str, Wish]]) -> Iterator[str]:
        """Pictures side by side, each with what is said of it and how well it fits its target."""
        done = []
        for caption, wish in wishes:
            image = self.studio.picture(wish)
            fits = agreements(self.studio, image, wish.logits)
            done.append(figure(image, f"{caption}: {fits}", caption.replace(" ", "_")))
            yield f'<div class="strip">{"".join(done)}</div>'

    def compare(self, *values) -> Iterator[str]:
        wish = wish_of(values)
        return self.strip((rule, replace(wish, rule=rule)) for rule in RULES[::-1])

    def walk(self, start: list[float] | None, count: float, *values) -> Iterator[str]:
        if start is None:
            raise InputError("keep a start first: set the sliders and press 'These sliders are the start'")
        wish, shares = wish_of(values), [k / (count - 1) for k in range(int(count))]
        between = [[a + t * (b - a) for a, b in zip(start, wish.logits, strict=True)] for t in shares]
        return self.strip(
            (f"{t:.0%} of the way", replace(wish, logits=tuple(logits)))
            for t, logits in zip(shares, between, strict=True)
        )

    def seeds(self, count: float, *values) -> Iterator[str]:
        wish = wish_of(values)
        return self.strip((f"seed {wish.seed + k}", replace(wish, seed=wish.seed + k)) for k in range(int(count)))


# --- The page --------------------------------------------------------------------------------------------------------


def controls(gr, studio: Studio) -> SimpleNamespace:
    """The left column: where to start from, the sliders, and how to draw."""
    c, sliders = SimpleNamespace(), {}
    names, chosen = list(studio.faces), studio.page.steps
    with gr.Column(scale=2, min_width=300):
        c.choice = gr.Dropdown(names, label="Start from the logits of", value=names[0])
        c.changes = gr.Radio(list(CHANGES), label="and make them", value=None)
        for title, group in grouped(studio.attributes).items():
            with gr.Accordion(title, open=title == "Hair"):
                for i in group:
                    without, present = studio.typical[i]
                    sliders[i] = gr.Slider(
                        *studio.range[i], value=without, step=0.1, label=studio.attributes[i].replace("_", " "),
                        info=f"typical: {without:+.0f} without, {present:+.0f} with",
                    )  # fmt: skip
        with gr.Row():
            seed = gr.Number(7, label="Seed", precision=0, minimum=0, maximum=2**31 - 1)
            steps = gr.Slider(min(5, chosen), max(200, chosen), value=chosen, step=1, label="Steps")
        rule = gr.Radio(list(RULES), value=RULES[0], label="Rule")
    c.logits = [sliders[i] for i in range(len(studio.attributes))]
    c.wishes = [*c.logits, seed, steps, rule]
    return c


def tabs(gr) -> SimpleNamespace:
    """The right column: the natural pseudo-inverse, and what is drawn."""
    c = SimpleNamespace()
    with gr.Column(scale=3, min_width=320):
        c.inverse = gr.HTML(elem_classes="small")
        with gr.Tab("Draw"):
            with gr.Row():
                c.start_drawing, c.stop_drawing = gr.Button("Draw", variant="primary"), gr.Button("Stop")
            c.drawn, c.seen, c.how = gr.HTML(), gr.HTML(), gr.HTML()
            c.link = gr.Textbox(label="Link to this face", interactive=False)
        with gr.Tab("Edit"):
            c.upload = gr.File(label="Portrait (at most 10 MB)", file_types=["image"], type="filepath")
            c.portrait = gr.State(None)
            with gr.Row():
                c.start_editing = gr.Button("Draw with these sliders", variant="primary")
                c.stop_editing = gr.Button("Stop")
            with gr.Row():
                c.given, c.edited, c.edit_natural = gr.HTML(), gr.HTML(), gr.HTML()
            c.edit_told = gr.HTML()
        with gr.Tab("Compare"):
            c.start_comparing = gr.Button("Draw by every rule, from the same noise", variant="primary")
            c.compared = gr.HTML()
        with gr.Tab("Walk"):
            c.start_of_walk = gr.State(None)
            c.keep_start = gr.Button("These sliders are the start")
            c.how_many = gr.Slider(2, 9, value=5, step=1, label="Pictures")
            with gr.Row():
                c.start_walking = gr.Button("Walk from the start to these sliders", variant="primary")
                c.start_seeds = gr.Button("Several seeds of these sliders")
            c.walked = gr.HTML()
    return c


def build(studio: Studio):
    """The page, a `gradio.Blocks`."""
    import gradio as gr

    events = Events(studio)
    busy = {"concurrency_id": "sampler", "concurrency_limit": 1}  # one picture at a time: two would both be slow

    def told(event: Callable) -> Callable:
        """The event, whose mistakes the visitor is told of."""

        def run(*values):
            try:
                yield from event(*values)
            except InputError as error:
                raise gr.Error(str(error)) from None

        return run

    def draw(request: gr.Request, *values) -> Iterator[tuple]:
        yield from events.draw(str(request.request.base_url), *values)

    def arrive(request: gr.Request) -> tuple:
        wish = Wish(next(iter(studio.faces.values())), 7, studio.page.steps, RULES[0])
        if state := request.query_params.get("state"):
            try:
                wish = Wish.from_link(state, studio.range)
            except InputError as error:
                gr.Warning(str(error))
        return *wish.logits, wish.seed, wish.steps, wish.rule, events.natural(*wish.logits)

    with gr.Blocks(title="Forty sliders", delete_cache=(60, 60)) as page:
        gr.Markdown(f"# Forty sliders\nA face from nothing but {len(studio.attributes)} attribute logits: a "
                    "classifier's exact pseudo-inverse, and a frozen diffusion model steered by it.")  # fmt: skip
        with gr.Row(elem_classes="columns"):
            c, r = controls(gr, studio), tabs(gr)
        hidden = {"show_progress": "hidden"}
        page.load(arrive, None, [*c.wishes, r.inverse], **hidden)
        # one event for all forty: a face to start from moves them all at once, and none of it may fill the queue
        gr.on([slider.change for slider in c.logits], events.natural, c.logits, r.inverse, trigger_mode="always_last",
              queue=False, **hidden)  # fmt: skip
        c.choice.input(studio.faces.get, c.choice, c.logits, **hidden)
        c.changes.input(lambda change, *y: studio.changed(change, y), [c.changes, *c.logits], c.logits, **hidden)
        event = r.start_drawing.click(draw, c.wishes, [r.drawn, r.seen, r.how, r.link], show_progress="minimal", **busy)
        r.stop_drawing.click(None, cancels=[event])
        r.upload.upload(told(events.read_portrait), r.upload, [r.given, r.portrait, *c.logits])
        edited = [r.edited, r.edit_natural, r.edit_told]
        event = r.start_editing.click(told(events.edit), [r.portrait, *c.wishes], edited, **busy)
        r.stop_editing.click(None, cancels=[event])
        r.start_comparing.click(told(events.compare), c.wishes, r.compared, **busy)
        r.keep_start.click(lambda *y: (list(y), "<p>The start is kept. Now move the sliders.</p>"), c.logits,
                           [r.start_of_walk, r.walked])  # fmt: skip
        r.start_walking.click(told(events.walk), [r.start_of_walk, r.how_many, *c.wishes], r.walked, **busy)
        r.start_seeds.click(told(events.seeds), [r.how_many, *c.wishes], r.walked, **busy)
    return page


def given_flags(argv: Sequence[str] | None) -> list[str]:
    """The words of the page's command line that the reconstruction command takes too."""
    own, kept, takes = {f"--{each.name}" for each in fields(Page)}, [], True
    for word in sys.argv[1:] if argv is None else argv:
        if word.startswith("--"):
            takes = word.split("=")[0] not in own
        kept += [word] * takes
    return kept


def without_path(error: Exception, path: str) -> str:
    """What is wrong, without the server's folders."""
    return str(error).replace(str(path), "the picture")


def main(argv: Sequence[str] | None = None) -> int:
    page, networks, rule, walk, architecture = parse(
        __doc__, Page, NetworkSettings, RuleSettings, WalkSettings, argv=argv, extra=COMMAND_ONLY, presets=CONFIGS
    )
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise InputError("the page needs gradio: pip install -r requirements-page.txt") from None
    device = resolve_device(networks.device)
    architecture = {key: value for key, value in architecture.items() if key in PRESET_ONLY}
    studio = Studio(load_networks(networks, architecture, device), rule, walk, page, given_flags(argv))
    with tempfile.TemporaryDirectory() as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
        blocks = build(studio).queue(max_size=page.waiting)
        blocks.launch(server_name=page.host, server_port=page.port, max_file_size=LARGEST_UPLOAD, css=STYLE)
    return 0


if __name__ == "__main__":
    run_command(main)
