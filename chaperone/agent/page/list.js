// The runs of a spool: listed once, then kept up to date by the agent's events.

const SHOWN = 200; // rows at a time: a table of 10,000 freezes a phone
const RETRY_MS = [500, 1_000, 2_000, 5_000, 10_000];

class List {
  #agent;
  #health;
  #stop;
  #limit = SHOWN;
  #drawing = 0;
  #drawn = 0;
  #hosts = new Map();
  runs = new Map(); // id to status

  // `health(sentence, bad)` shows how the agent is; `seen(status)` is called for each status that
  // arrives.
  constructor(agent, health, seen) {
    this.#agent = agent;
    this.#health = health;
    this.seen = seen;
    for (const id of ["state", "text", "label", "host", "since"]) {
      $(id).addEventListener("input", () => {
        this.#limit = SHOWN;
        this.draw();
      });
    }
    $("collected").addEventListener("change", () => this.open());
    $("filters").addEventListener("submit", (event) => event.preventDefault());
    for (const id of ["hours", "group"]) $(id).addEventListener("change", () => this.draw());
    $("more").addEventListener("click", () => {
      this.#limit += SHOWN;
      this.draw();
    });
    $("picture").addEventListener("click", (event) => {
      const id = event.target.dataset?.run;
      if (id) location.hash = address(agent.spool, id);
    });
    addEventListener("resize", () => this.draw());
    setInterval(() => this.#tick(), 1_000);
  }

  // Show the spool of the agent, until `close`; it begins anew whenever the agent was lost.
  async open() {
    this.close();
    const stop = (this.#stop = new AbortController());
    for (let failures = 0; !stop.signal.aborted;) {
      try {
        await this.#follow(stop.signal, () => {
          failures = 0;
        });
        await pause(RETRY_MS[0], stop.signal);
      } catch (error) {
        if (stop.signal.aborted) return;
        if (error.status === 401) {
          this.#health("The agent refuses this token now; forget it, and give another.", true);
          return;
        }
        this.#health(`The agent does not answer (${visible(error.message)}); trying again.`, true);
        await pause(RETRY_MS[Math.min(failures, RETRY_MS.length - 1)], stop.signal);
        failures += 1;
      }
    }
  }

  close() {
    this.#stop?.abort();
  }

  async #follow(signal, well) {
    const agent = this.#agent;
    // The cursor first: what happens while the runs are listed comes as an event.
    const cursor = await agent.json(agent.at("cursor"), { signal });
    const runs = new Map();
    for await (const found of agent.runs($("collected").checked, signal)) {
      for (const status of found.runs) runs.set(status.run_id, status);
      for (const [id, host] of Object.entries(found.hosts ?? {})) this.#hosts.set(id, host);
    }
    this.runs = runs;
    for (const status of runs.values()) this.seen(status);
    this.draw();
    const body = JSON.stringify({ cursor, streams: [] });
    const answer = await agent.request("POST", agent.at("events"), { body, signal });
    this.#health("Live", false);
    well();
    for await (const event of agent.lines(answer)) {
      if (!event) continue;
      const status = event.status;
      if (status) {
        this.runs.set(event.run_id, status);
        this.seen(status);
      } else if (event.event === "ended") this.runs.delete(event.run_id);
      this.draw();
    }
  }

  hostOf(status) {
    const known = this.#hosts.get(status.run_id);
    if (known !== undefined) return known;
    if (!status.connection) return status.chaperone_host ?? "";
    this.#hosts.set(status.run_id, "…");
    this.#agent
      .json(this.#agent.run(status.run_id, "/spec"))
      .then((found) => {
        const hops = found.spec.remote?.hops ?? [];
        const far = hops
          .map((hop) => Object.values(hop)[0])
          .reverse()
          .find((hop) => hop.host ?? hop.container ?? hop.image);
        this.#hosts.set(
          status.run_id,
          far?.host ?? far?.container ?? far?.image ?? status.chaperone_host,
        );
        this.draw();
      })
      .catch(() => {});
    return "…";
  }

  // At most a few times a second, however many events there are.
  draw() {
    if (this.#drawing) return;
    const due = Math.max(0, 150 - (performance.now() - this.#drawn));
    this.#drawing = setTimeout(() => {
      this.#drawing = 0;
      this.#drawn = performance.now();
      this.#render();
    }, due);
  }

  #fitting() {
    const state = $("state").value,
      text = $("text").value.toLowerCase(),
      host = $("host").value.toLowerCase();
    const [name, value] = $("label").value.split(/=(.*)/s);
    const since = $("since").value ? Date.now() - Number($("since").value) * 3_600_000 : null;
    const found = [...this.runs.values()].filter((status) => {
      if (
        state === "live"
          ? isFinal(status)
          : state === "failed"
            ? !hasFailed(status)
            : state && state !== status.state
      )
        return false;
      if (
        name &&
        (!(name in status.labels) || (value !== undefined && status.labels[name] !== value))
      )
        return false;
      if (since !== null && status.end_time && Date.parse(status.end_time) < since) return false;
      if (host && !String(this.hostOf(status)).toLowerCase().includes(host)) return false;
      return (
        !text ||
        status.run_id.toLowerCase().includes(text) ||
        program(status).toLowerCase().includes(text)
      );
    });
    return found.sort((one, other) =>
      String(other.create_time) < String(one.create_time) ? -1 : 1,
    );
  }

  #render() {
    const found = this.#fitting();
    const total = this.runs.size;
    $("count").textContent =
      found.length === total ? `${total} runs` : `${found.length} of ${total} runs`;
    $("more").hidden = found.length <= this.#limit;
    $("more").textContent = `Show ${Math.min(SHOWN, found.length - this.#limit)} more`;
    const rows = new Map([...$("rows").children].map((row) => [row.dataset.run, row]));
    const wanted = found.slice(0, this.#limit).map((status) => {
      const row = rows.get(status.run_id) ?? this.#row(status.run_id);
      this.#fill(row, status);
      return row;
    });
    const focused = document.activeElement?.closest?.("#rows tr");
    if (
      wanted.length !== $("rows").children.length ||
      wanted.some((row, at) => $("rows").children[at] !== row)
    ) {
      $("rows").replaceChildren(...wanted);
      if (focused?.isConnected) focused.querySelector("a").focus();
    }
    this.#groups();
    const label = $("group").value.slice(1);
    const rowOf = (status) => String((label ? status.labels[label] : this.hostOf(status)) ?? "-");
    const room = $("picture").clientWidth || innerWidth;
    $("picture").replaceChildren(
      timeline(found, Number($("hours").value), rowOf, Date.now(), room),
    );
  }

  // The label names that the timeline can be grouped by.
  #groups() {
    const names = new Set();
    for (const status of this.runs.values()) {
      for (const name of Object.keys(status.labels)) if (names.size < 50) names.add(name);
    }
    const wanted = ["", ...[...names].sort().map((name) => `=${name}`)];
    const select = $("group");
    if (wanted.join("\n") === [...select.options].map((option) => option.value).join("\n")) return;
    const chosen = select.value;
    select.replaceChildren(
      ...wanted.map(
        (value) => new Option(value ? `label ${visible(value.slice(1))}` : "host", value),
      ),
    );
    select.value = wanted.includes(chosen) ? chosen : "";
  }

  #row(id) {
    const row = document.createElement("tr");
    row.dataset.run = id;
    for (const name of ["state", "run", "outcome", "host", "time", "elapsed", "program"]) {
      const cell = document.createElement("td");
      cell.className = name;
      row.append(cell);
    }
    const link = document.createElement("a");
    link.href = address(this.#agent.spool, id);
    link.textContent = visible(id);
    row.children[1].append(link);
    return row;
  }

  #fill(row, status) {
    const [state, , ended, host, time, long, what] = row.children;
    put(state, status.state);
    state.className = `state ${tone(status)}`;
    put(ended, visible(outcome(status)));
    put(host, visible(this.hostOf(status)));
    put(time, status.start_time ? clock(status.start_time) : "");
    put(long, duration(elapsed(status)));
    const text = program(status);
    put(what, text.length > 300 ? `${text.slice(0, 299)}…` : text);
  }

  #tick() {
    if ($("runs").hidden) return;
    for (const row of $("rows").children) {
      const status = this.runs.get(row.dataset.run);
      if (status && !isFinal(status)) put(row.children[5], duration(elapsed(status)));
    }
  }
}

function put(cell, text) {
  if (cell.textContent !== text) cell.textContent = text;
}
