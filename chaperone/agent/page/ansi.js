// Text of a terminal as nodes: colours become classes, every other escape sequence goes, and
// nothing is markup.

const LONGEST_ESCAPE = 256; // characters; what is longer is no sequence
// CSI, OSC and the like (up to BEL or ST), and two-character sequences.
const ESCAPE =
  /\x1b(?:\[([0-?]*)[ -/]*([@-~])|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]*[0-Z\\`-~])/g;
const UNFINISHED = /\x1b(?:\[[0-?]*[ -/]*|[\]PX^_][^\x07\x1b]*\x1b?|[ -/]*)$/;

class Ansi {
  #left = "";
  #classes = new Set();
  #colour = "";

  // The nodes of some more text; the beginning of a sequence waits for its rest.
  nodes(text) {
    let data = this.#left + text;
    this.#left = "";
    const unfinished = UNFINISHED.exec(data);
    if (unfinished && data.length - unfinished.index <= LONGEST_ESCAPE) {
      this.#left = data.slice(unfinished.index);
      data = data.slice(0, unfinished.index);
    }
    const made = document.createDocumentFragment();
    let from = 0;
    for (const found of data.matchAll(ESCAPE)) {
      this.#add(made, data.slice(from, found.index));
      if (found[2] === "m") this.#select((found[1] || "0").split(/[;:]/).map(Number));
      from = found.index + found[0].length;
    }
    this.#add(made, data.slice(from));
    return made;
  }

  #add(to, text) {
    if (!text) return;
    const shown = text
      .replace(/\r\n/g, "\n")
      .replace(/\r/g, "\n")
      .split(/([\n\t])/)
      .map((part) => (part === "\n" || part === "\t" ? part : visible(part)))
      .join("");
    if (!this.#classes.size && !this.#colour) {
      to.append(shown);
      return;
    }
    const span = document.createElement("span");
    span.className = [...this.#classes].join(" ");
    if (this.#colour) span.style.color = this.#colour;
    span.textContent = shown;
    to.append(span);
  }

  #select(codes) {
    for (let at = 0; at < codes.length; at += 1) {
      const code = codes[at];
      if (code === 0) {
        this.#classes.clear();
        this.#colour = "";
      } else if ([1, 2, 3, 4, 7].includes(code)) this.#classes.add(" bdiu..r"[code]);
      else if (code === 22) {
        this.#classes.delete("b");
        this.#classes.delete("d");
      } else if ([23, 24, 27].includes(code)) {
        this.#classes.delete({ 23: "i", 24: "u", 27: "r" }[code]);
      } else if (code >= 30 && code <= 37) this.#foreground(`f${code - 30}`);
      else if (code >= 90 && code <= 97) this.#foreground(`f${code - 90}`);
      else if (code === 39) this.#foreground("");
      else if (code === 38 || code === 48) {
        // A colour of 256, or red, green and blue; backgrounds are left out: they hide text.
        const rgb = codes[at + 1] === 2 ? codes.slice(at + 2, at + 5) : null;
        const number = codes[at + 1] === 5 ? codes[at + 2] : null;
        if (code === 38 && rgb?.length === 3) {
          this.#foreground("", `rgb(${rgb.map((each) => Math.min(255, each || 0)).join(" ")})`);
        } else if (code === 38 && number !== null) this.#indexed(number);
        at += rgb ? 4 : 2;
      }
    }
  }

  #indexed(number) {
    if (number < 16) {
      this.#foreground(`f${number % 8}`);
      return;
    }
    if (number >= 232) {
      this.#foreground(
        "",
        `rgb(${Array(3)
          .fill(8 + (number - 232) * 10)
          .join(" ")})`,
      );
      return;
    }
    const cube = [
      Math.floor((number - 16) / 36),
      Math.floor((number - 16) / 6) % 6,
      (number - 16) % 6,
    ];
    this.#foreground("", `rgb(${cube.map((each) => (each ? 55 + each * 40 : 0)).join(" ")})`);
  }

  #foreground(name, colour = "") {
    for (const each of [...this.#classes]) if (/^f\d$/.test(each)) this.#classes.delete(each);
    if (name) this.#classes.add(name);
    this.#colour = colour;
  }
}
