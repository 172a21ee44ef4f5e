// Inside the `node` image: an express service with the modules that such services have.
//
//     node service.js PORT
//
// GET /health answers 200. Ends with its standard input where that is a pipe, as whoever started it holds.
"use strict";

console.log("node runs");

const fs = require("fs");
const express = require("express");
const moment = require("moment");
const _ = require("lodash");
const semver = require("semver");
const yaml = require("js-yaml");
const Ajv = require("ajv");
const winston = require("winston");
const { WebSocketServer } = require("ws");
require("axios");
require("yargs");
require("handlebars");
require("core-js");
require("@babel/core"); // as services do that compile what they serve

const log = winston.createLogger({ transports: [new winston.transports.Console({ stderrLevels: ["info"] })] });
const settings = yaml.load("service: {name: orders, version: 1.2.3}").service;
const valid = new Ajv().compile({ type: "object", required: ["id"] });

const app = express();
app.get("/health", (request, response) => response.json({ name: settings.name, at: moment().toISOString() }));
app.post("/orders", express.json(), (request, response) =>
  valid(request.body) ? response.json(_.pick(request.body, "id")) : response.sendStatus(400),
);

const port = Number(process.argv[2]);
const server = app.listen(port, () => {
  log.info("listening", { port, version: semver.inc(settings.version, "patch") });
  console.log(`ready ${port}`);
});
new WebSocketServer({ server });

if (fs.fstatSync(0).isFIFO()) {
  process.stdin.resume().on("end", () => process.exit(0));
}
